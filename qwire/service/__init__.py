"""What all services share: configuration, the gRPC server, interceptors, health and the status catalogue."""
