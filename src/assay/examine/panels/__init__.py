"""The panels: one file each, found by themselves."""
