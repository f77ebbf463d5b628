"""The wire format, `hkv_inference.proto`, and the stubs generated from it; edit the former, never the latter."""
