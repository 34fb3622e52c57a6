"""The equations: preference losses and the refinement function, pure and unreduced."""
