"""Images from the weights of a run, for the preview, the `sample` command, reports and evaluation alike."""
