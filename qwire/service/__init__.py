"""What all services share: configuration, the gRPC server, its boundary, health and the status catalogue."""
