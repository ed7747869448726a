"""An installed plug-in with one of everything."""
