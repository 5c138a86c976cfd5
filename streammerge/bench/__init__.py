"""`streammerge bench`: how long a merge of a given size would take on this machine, and how much memory."""
