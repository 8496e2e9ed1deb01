"""Hub, uplink, replication, coverage, fan-out and access policy. Speaks no DIMSE and no HTTP."""
