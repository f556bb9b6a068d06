"""A reading as standard objects: DICOM structured reports, presentation states and PDF, and a FHIR report."""

KINDS = ("findings_sr", "text_sr", "gsps", "pdf")
"""DICOM objects that a reading can become."""
