"""Packs and facts: what lies on disk, and what was promised of it. Knows records and bytes, no DICOM
attribute."""
