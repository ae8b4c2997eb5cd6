"""Writes and reads files of any content: write-then-rename, lines of JSON, checks for ordinary files. Imports no other
room."""
