"""The tree of all settings, and its composition by Hydra."""
