"""What tests of several folders share, importable as `support`: data sets to write, a module to train, a server."""
