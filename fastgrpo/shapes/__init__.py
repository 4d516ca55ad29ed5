"""The embedded world: captions, renderer, codec, analytic judge, the shipped checkpoint and the
script that makes it.
"""
