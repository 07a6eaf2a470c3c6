"""Models trained apart and used together: how they sample, are combined and are kept on disk."""
