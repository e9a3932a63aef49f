"""The router: the public face, and the only process that clients talk to."""
