"""`streammerge plan`: what a merge will do to every tensor, what it takes and how long, before anything is written."""
