"""The faces of hkv-jax that are not Python: the gRPC server and client, and the `hkv-jax` command.

Owns protocols, threads and the command line; must never know a model, a block or a kernel. Importing it loads nothing
heavy.
"""
