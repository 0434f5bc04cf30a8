"""What a stored cache holds, computed for people: facts about sequences, chunks, room, misses and differences.

Every module works on a store that is open with mode "r" and changes nothing. How facts are shown is not known here.
"""
