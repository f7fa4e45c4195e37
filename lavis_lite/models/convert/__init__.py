"""Other people's checkpoints: BERT for the Q-Former; LAVIS's and Hugging Face's BLIP-2, in and out.

rules.py     how a map of names is written and applied, in both directions from one table
lavis.py hf.py   the tables
formats.py   which table a file is written in
command.py   `lavis-lite convert`
"""
