"""Conversion of whole models: between the forms of the frameworks, and to folders and files of other programs."""
