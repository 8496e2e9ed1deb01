"""Hub, uplink, replication, coverage, fan-out and access policy. Speaks no DIMSE and no HTTP."""

import protos as protos  # before gRPC: says which TLS it speaks
