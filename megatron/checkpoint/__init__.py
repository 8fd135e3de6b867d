"""Checkpoints that belong to no layout: files, writer, reader, and which one ``--load`` means."""
