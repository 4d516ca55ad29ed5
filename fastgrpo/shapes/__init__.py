"""The embedded world, which trains on a laptop: prompts, renderer, codec, analytic judge,
generator, the shipped checkpoint and the script that makes it.
"""
