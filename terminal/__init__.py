"""How the command line speaks: results on stdout, everything else on stderr."""
