"""Generators of real size, one file per backbone. A recipe names the class by its dotted path, and
each implements `fastgrpo.interfaces.Policy`.
"""
