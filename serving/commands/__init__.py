"""The subcommands of `hkv-jax`: one module each, with ``add_parser`` for its flags and ``run`` for its work.

A module is imported for every call of the command line, so that ``--help`` knows all flags; what is heavy (jax, grpc)
is imported by ``run``.
"""
