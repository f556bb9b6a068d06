"""Windows of images to embeddings; the requests that Triton batches run as one batch of the vision graph."""

import numpy as np
import triton_python_backend_utils as pb_utils

from cxr_triton.engines.bundle import Bundle
from cxr_triton.triton_repo.adapter import error_response, parameters

INPUTS = ("PIXEL_WINDOWS", "PATCH_ROWS_COLS", "VALID", "MERGE_ORDER")


class TritonPythonModel:
    def initialize(self, args):
        values = parameters(args)
        bundle = Bundle.open(values["bundle"], verify=False)
        self.session = bundle.open_vision(threads=int(values["threads"]) or None)

    def execute(self, requests):
        try:
            inputs = [
                [pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in INPUTS] for request in requests
            ]
            batch = [np.concatenate(tensors) for tensors in zip(*inputs, strict=True)]  # [B, W, ...] of all requests
            embeddings = self.session.encode(*batch)  # [B, T, hidden]
        except Exception as error:
            if len(requests) == 1:
                return [error_response(error)]
            # One that somebody sent past dicom_preprocess fails alone.
            return [response for request in requests for response in self.execute([request])]
        ends = np.cumsum([len(tensors[0]) for tensors in inputs])[:-1]
        return [
            pb_utils.InferenceResponse([pb_utils.Tensor("IMAGE_EMBEDDINGS", part)])
            for part in np.split(embeddings, ends)
        ]
