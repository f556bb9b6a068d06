"""IMAGES and REQUEST to the tensors of the next steps; see `cxr_triton.engines.pipeline.Preprocessor`."""

import numpy as np
import triton_python_backend_utils as pb_utils

from cxr_triton.engines.pipeline import Preprocessor
from cxr_triton.engines.secret import Seal
from cxr_triton.triton_repo.adapter import error_response, parameters, trace_of
from cxr_triton.triton_repo.drain import in_work, require_admission


class TritonPythonModel:
    def initialize(self, args):
        self.preprocessor = Preprocessor(parameters(args)["bundle"])
        self.context = Seal("CONTEXT")

    def execute(self, requests):
        with in_work():
            return [self.prepare(request) for request in requests]

    def prepare(self, request):
        try:
            require_admission()
            images = list(pb_utils.get_input_tensor_by_name(request, "IMAGES").as_numpy())
            asked = pb_utils.get_input_tensor_by_name(request, "REQUEST").as_numpy()[0]
            step = self.preprocessor.prepare(images, asked, trace_of(request))
            context = self.context.close(step.context, step.input_ids, step.image_index, step.position_ids)
        except Exception as error:
            return error_response(error, request)
        return pb_utils.InferenceResponse(
            [
                pb_utils.Tensor("PIXEL_WINDOWS", step.pixel_windows),
                pb_utils.Tensor("PATCH_ROWS_COLS", step.patch_rows_cols),
                pb_utils.Tensor("VALID", step.valid),
                pb_utils.Tensor("MERGE_ORDER", step.merge_order),
                pb_utils.Tensor("INPUT_IDS", step.input_ids),
                pb_utils.Tensor("IMAGE_INDEX", step.image_index),
                pb_utils.Tensor("POSITION_IDS", step.position_ids),
                pb_utils.Tensor("CONTEXT", np.array([context.encode()], object)),
            ]
        )

    def finalize(self):
        self.preprocessor.close()
