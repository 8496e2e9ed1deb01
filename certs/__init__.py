"""Authority, profiles, enrolment, renewal, revocation and run-time credentials. Knows no DICOM."""
