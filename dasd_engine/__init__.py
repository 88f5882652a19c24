"""DASD Engine: distils a reasoning teacher into a small student, one command a step."""
