"""A vision-language model as a judge, asked three questions per video."""
