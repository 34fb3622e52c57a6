"""The equations: preference losses and the refinement function, as pure functions without reduction."""
