"""Router, experts and HTTP on Ray Serve."""
