"""What goes wrong with an artefact."""


class ArtifactError(ValueError):
    """An artefact cannot be written, or is not what its manifest promises; the message names the file."""
