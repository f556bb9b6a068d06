"""The PACS gateway: studies in, readings back as DICOM and FHIR objects, through a durable queue."""
