"""The index: what is in the packs, findable. Derived and disposable; rows of its tables stay in this
folder."""
