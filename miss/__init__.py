"""The `miss` command: composes the other packages."""
