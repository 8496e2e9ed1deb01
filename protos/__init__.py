"""The region's wire, as .proto files and the code generated from them (`python -m protos.generate`)."""
