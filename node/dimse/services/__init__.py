"""The DIMSE services of a node: one module each, over the archive's own interfaces."""
