"""`anarcho watch`: a run that is under way, seen from another terminal."""
