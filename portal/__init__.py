"""DICOMweb, pages, sign-in and the viewer."""
