"""After a run: tables and figures of evaluation, bias and ablation, and what the report page is
made of.
"""
