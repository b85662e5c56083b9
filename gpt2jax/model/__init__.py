"""The network: its configuration and its modules."""
