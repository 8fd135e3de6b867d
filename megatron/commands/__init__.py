"""What the programs do, one thin file a verb; the doors in tools/ and at the top level call these."""
