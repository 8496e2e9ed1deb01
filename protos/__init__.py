"""The region's wire, as .proto files and the code generated from them (`python -m protos.generate`).

Also where gRPC is told, before anything here imports it, to speak TLS 1.3 alone. Its Python API has no
option for that (grpc/grpc#37305), but a list of cipher suites, read from the environment when `grpc` is
first imported, which BoringSSL uses for TLS 1.2 and older only. With nothing but RSA suites on it, in a
region where every key is ECDSA, an old handshake finds no suite to agree on. Packages that import gRPC
import this one first; `certs/gate.py` looks at the version again on every call.
"""

from __future__ import annotations

import os

os.environ["GRPC_SSL_CIPHER_SUITES"] = "ECDHE-RSA-AES256-GCM-SHA384"
