"""The live studio: merge, measure and look by button, on the merge page that a small server answers."""
