"""`make demo`: a whole Lightbox on this machine, with real parts and made-up people."""
