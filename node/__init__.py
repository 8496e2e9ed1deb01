"""What a ward runs: byte pump, DIMSE services, admission."""
