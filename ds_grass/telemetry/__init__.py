"""What a run tells about itself: on the console, in grass.jsonl, to monitors and the Trainer.

The means; `zero/journal.py` decides what is worth telling, and when. `report/log.py` reads the log back.
"""
