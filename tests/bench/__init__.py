"""How fast Lightbox is, as ratios against the Orthanc behind it: `make bench`."""
