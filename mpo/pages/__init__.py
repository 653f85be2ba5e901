"""What `mpo report` draws and counts, a module per kind of thing on the page."""
