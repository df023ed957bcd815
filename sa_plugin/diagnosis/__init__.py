"""Does SA help my network? ``measurement`` measures it, ``findings`` holds and shows the result."""
