"""Every configuration key that this project adds to Detectron2's."""

from detectron2.config import CfgNode

# See SEMASK_VERSION.
KEYS_VERSION = 2


def add_semask_config(cfg: CfgNode) -> None:
    """Add the keys of this project to ``cfg`` (a Detectron2 ``get_cfg()``), in place.

    Where another project has keys of the same names (a ``MODEL.SWIN``, DeepLab's
    ``SOLVER.POLY_LR_POWER``), call this after the other's function.
    """
    # Version of the keys below: it increases when the meaning of an older file would change. A run
    # writes it into its config.yaml; in files written by hand it can be left out.
    cfg.SEMASK_VERSION = KEYS_VERSION
    # What is predicted, evaluated and reported: "semantic" (a class for each pixel), "instance"
    # (Detectron2's detectors), "panoptic" (both), or a task that you have registered yourself.
    cfg.TASK = "semantic"
    # Refuse a second run that would write to the same OUTPUT_DIR at the same time.
    cfg.OUTPUT_DIR_LOCK = True
    # Experiment trackers that record a training in addition to OUTPUT_DIR: "wandb", "mlflow",
    # "trackio" (pip install 'semask[trackers]'), or trackers that you have registered yourself.
    cfg.TRACKERS = []
    # Project (MLflow: experiment) and name of the run; "" = the tracker's own environment
    # variables, or else "semask" and the name of the folder OUTPUT_DIR.
    cfg.TRACKING = CfgNode()
    cfg.TRACKING.PROJECT = ""
    cfg.TRACKING.RUN_NAME = ""
    # Also read MODEL.WEIGHTS files ending in .pkl that hold more than NumPy arrays. Reading one can
    # run arbitrary code: only for files whose author you trust.
    cfg.MODEL.ALLOW_PICKLE = False
    # "strict": MODEL.WEIGHTS must fit the model completely. "initialise": a training loads the
    # parameters that fit, for instance from a model with other classes or without semantic layers,
    # initialises the others, and lists them in the log.
    cfg.MODEL.WEIGHTS_MODE = "strict"
    # The recipe starts from pre-trained weights: a training without MODEL.WEIGHTS, or
    # MODEL.TIMM.PRETRAINED, gives a warning.
    cfg.MODEL.EXPECTS_WEIGHTS = False

    # Faster forms of the same computations: "auto" (those suited to MODEL.DEVICE), "none", or a
    # comma-separated list of names from semask/ops/apply.py. The log lists those in use.
    cfg.MODEL.FAST_PATHS = "auto"

    # ---- Swin transformer (arXiv 2103.14030); lists have one entry per stage ----
    cfg.MODEL.SWIN = cfg.MODEL.get("SWIN", CfgNode())  # other projects may add this section
    # Channels of the first stage; they double at each following stage.
    cfg.MODEL.SWIN.EMBED_DIM = 96
    # Swin blocks and attention heads of each stage.
    cfg.MODEL.SWIN.DEPTHS = [2, 2, 6, 2]
    cfg.MODEL.SWIN.NUM_HEADS = [3, 6, 12, 24]
    # Side of the attention window, in tokens.
    cfg.MODEL.SWIN.WINDOW_SIZE = 7
    # Hidden width of a block's MLP, as a multiple of its channels.
    cfg.MODEL.SWIN.MLP_RATIO = 4.0
    # Dropout after projections and MLP layers, on attention weights, and stochastic depth
    # (which rises linearly from 0 to this rate over all blocks).
    cfg.MODEL.SWIN.DROP_RATE = 0.0
    cfg.MODEL.SWIN.ATTN_DROP_RATE = 0.0
    cfg.MODEL.SWIN.DROP_PATH_RATE = 0.3
    # Learned absolute position embedding, and the image side that it is defined for.
    cfg.MODEL.SWIN.ABSOLUTE_POS_EMBED = False
    cfg.MODEL.SWIN.PRETRAIN_IMAGE_SIZE = 224
    # Features returned, among "res2".."res5" (strides 4, 8, 16, 32).
    cfg.MODEL.SWIN.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    # Stages that are not trained: 0 = all are trained, 1 = the patch embedding is frozen,
    # 2 = also the first stage, and so on (Detectron2's meaning of MODEL.BACKBONE.FREEZE_AT).
    cfg.MODEL.SWIN.FREEZE_AT = 0
    # Recompute a stage's activations in the backward pass instead of keeping them. (The form
    # "recomputed" of MODEL.FAST_PATHS does so for single blocks.)
    cfg.MODEL.SWIN.ACTIVATION_CHECKPOINT = [False, False, False, False]

    # ---- a network of timm, with MODEL.BACKBONE.NAME "SeMaskTimm"; lists: one entry per stage ----
    cfg.MODEL.TIMM = CfgNode()
    # timm's name, such as "convnext_tiny.dinov3_lvd1689m", or "mit_b0" to "mit_b5";
    # docs/encoders.md lists the supported families.
    cfg.MODEL.TIMM.NAME = ""
    # Without MODEL.WEIGHTS, a training starts from timm's weights, from its cache or the Hub. Their
    # licence is logged: some forbid commercial use.
    cfg.MODEL.TIMM.PRETRAINED = False
    # Rate that stochastic depth reaches in the last block; 0 = the network's own default.
    cfg.MODEL.TIMM.DROP_PATH_RATE = 0.0
    # As for MODEL.SWIN.
    cfg.MODEL.TIMM.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.TIMM.FREEZE_AT = 0
    cfg.MODEL.TIMM.ACTIVATION_CHECKPOINT = [False, False, False, False]

    # ---- SeMask's semantic layers (arXiv 2112.12782, section 3) ----
    cfg.MODEL.SEMASK = CfgNode()
    # Semantic attention of each stage: "window", "global" or "none" (none anywhere = plain Swin).
    cfg.MODEL.SEMASK.ATTENTION = ["window", "window", "global", "global"]
    # Chained semantic attention blocks of each stage; 0 is the same as "none".
    cfg.MODEL.SEMASK.NUM_BLOCKS = [1, 1, 1, 1]
    # Side of the semantic window; 0 = as MODEL.SWIN.WINDOW_SIZE, with other encoders 7.
    cfg.MODEL.SEMASK.WINDOW_SIZE = 0
    # Classes of the semantic-prior maps; 0 = as MODEL.SEM_SEG_HEAD.NUM_CLASSES, and in detectors
    # the number of classes of the prior's target (PRIOR_TARGET below).
    cfg.MODEL.SEMASK.NUM_CLASSES = 0
    # Initialisation of the semantic attention, whose gamma (the paper's lambda) is 0: "live" = the
    # linear layer before gamma is random, so that gamma gets gradients; "published" = it is 0 as in
    # the published mask-classification models, so that neither ever changes.
    cfg.MODEL.SEMASK.INIT = "live"
    # Position of a semantic layer's normalisation: "stream" = on the residual stream, as published
    # for Swin; "branch" = only on the input of the semantic attention, so that with gamma 0 a
    # pre-trained network is exactly unchanged. "auto" = "stream" for Swin, and "branch" for others.
    cfg.MODEL.SEMASK.NORM = "auto"
    # Dropout at the end of a semantic attention block.
    cfg.MODEL.SEMASK.DROPOUT = 0.1
    # Detectors: what supervises the priors. "instances" = a map painted from the instances, whose
    # classes are the categories and one for the background; "sem_seg" = the dataset's semantic or
    # panoptic map, of MODEL.SEM_SEG_HEAD.NUM_CLASSES classes. Weight, ignore value and reduction
    # of the loss are PRIOR_LOSS_WEIGHT, IGNORE_VALUE and LOSS_REDUCTION of MODEL.SEM_SEG_HEAD.
    cfg.MODEL.SEMASK.PRIOR_TARGET = "instances"
    # Pixels outside all instances are ignored instead of background, for datasets in which not
    # every object is annotated.
    cfg.MODEL.SEMASK.IGNORE_OUTSIDE = False

    # ---- heads and losses (in addition to Detectron2's MODEL.SEM_SEG_HEAD keys) ----
    # Channel dropout before the last convolution.
    cfg.MODEL.SEM_SEG_HEAD.DROPOUT = 0.1
    # Weight of the semantic-prior loss, by default the paper's (arXiv 2112.12782, section 3.4); 0
    # leaves the prior without supervision.
    cfg.MODEL.SEM_SEG_HEAD.PRIOR_LOSS_WEIGHT = 0.4
    # Denominator of the cross entropy: "all" pixels (as published) or "valid" (not ignored) ones.
    cfg.MODEL.SEM_SEG_HEAD.LOSS_REDUCTION = "all"
    # Online hard example mining: pixels kept per image (100000 as published); 0 = off.
    cfg.MODEL.SEM_SEG_HEAD.OHEM_PIXELS = 0

    # ---- mask classification (MaskFormer, arXiv 2107.06278; Mask2Former, arXiv 2112.01527) ----
    # Keys named as in Mask2Former have the same meaning; MODEL.SEM_SEG_HEAD has the keys of the
    # pixel decoder, and the number of classes. Channels of the mask features.
    cfg.MODEL.SEM_SEG_HEAD.MASK_DIM = 256
    # Layers of Mask2Former's deformable transformer in the pixel decoder.
    cfg.MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS = 6
    cfg.MODEL.MASK_FORMER = CfgNode()
    # Pixel and mask decoder: "maskformer", "mask2former", "mask2former_fapn" or
    # "mask2former_msfapn".
    cfg.MODEL.MASK_FORMER.DECODER = "mask2former"
    # Number of queries Q, the maximum number of masks in an image.
    cfg.MODEL.MASK_FORMER.NUM_OBJECT_QUERIES = 100
    # Number of supervised predictions: with "maskformer" the number of decoder layers (6 as
    # published), with the others one more, for the learnt queries (10 as published, for 9 layers).
    cfg.MODEL.MASK_FORMER.DEC_LAYERS = 10
    # Channels, attention heads and hidden width of the feed-forward layers of the mask decoder.
    cfg.MODEL.MASK_FORMER.HIDDEN_DIM = 256
    cfg.MODEL.MASK_FORMER.NHEADS = 8
    cfg.MODEL.MASK_FORMER.DIM_FEEDFORWARD = 2048
    # Dropout of MaskFormer's mask decoder (0.1 as published) and of the deformable transformer (0);
    # Mask2Former's mask decoder has none.
    cfg.MODEL.MASK_FORMER.DROPOUT = 0.0
    # Weights of the losses and of the matching costs: class, mask and dice (1, 20, 1 for
    # MaskFormer); weight of "no object" among the classes.
    cfg.MODEL.MASK_FORMER.CLASS_WEIGHT = 2.0
    cfg.MODEL.MASK_FORMER.MASK_WEIGHT = 5.0
    cfg.MODEL.MASK_FORMER.DICE_WEIGHT = 5.0
    cfg.MODEL.MASK_FORMER.NO_OBJECT_WEIGHT = 0.1
    # Supervise every decoder layer, not only the last one.
    cfg.MODEL.MASK_FORMER.DEEP_SUPERVISION = True
    # Number of points at which Mask2Former compares masks. A share IMPORTANCE_SAMPLE_RATIO of them
    # are the most uncertain of OVERSAMPLE_RATIO times as many random candidates.
    cfg.MODEL.MASK_FORMER.TRAIN_NUM_POINTS = 12544
    cfg.MODEL.MASK_FORMER.OVERSAMPLE_RATIO = 3.0
    cfg.MODEL.MASK_FORMER.IMPORTANCE_SAMPLE_RATIO = 0.75
    # Images are padded to multiples of this number of pixels.
    cfg.MODEL.MASK_FORMER.SIZE_DIVISIBILITY = 32
    cfg.MODEL.MASK_FORMER.TEST = CfgNode()
    # What is predicted for an image: "sem_seg", "instances" (the TEST.DETECTIONS_PER_IMAGE with the
    # highest scores) and "panoptic_seg".
    cfg.MODEL.MASK_FORMER.TEST.SEMANTIC_ON = True
    cfg.MODEL.MASK_FORMER.TEST.INSTANCE_ON = False
    cfg.MODEL.MASK_FORMER.TEST.PANOPTIC_ON = False
    # Panoptic: minimum class probability of a query, and minimum share of its mask's area that is
    # not covered by queries of higher score.
    cfg.MODEL.MASK_FORMER.TEST.OBJECT_MASK_THRESHOLD = 0.8
    cfg.MODEL.MASK_FORMER.TEST.OVERLAP_THRESHOLD = 0.8
    # Semantic: resize the masks, not the class scores, to the original size. This is always done if
    # instances or panoptic segments are also predicted.
    cfg.MODEL.MASK_FORMER.TEST.SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE = False

    # ---- datasets ----
    # Your own datasets, each a mapping with NAME (for DATASETS.TRAIN and TEST), IMAGE_DIR and
    # LABEL_DIR, and optionally CLASSES, COLORS, IGNORE, IMAGE_EXT, LABEL_EXT and LABEL_MAP: the
    # arguments of semask.data.register_folder. CLASSES and IGNORE default to the next key and
    # MODEL.SEM_SEG_HEAD.IGNORE_VALUE. MODEL.SEM_SEG_HEAD.NUM_CLASSES 0 means the dataset's number
    # of classes.
    cfg.DATASETS.FOLDERS = []
    # Names of the classes, in the order of their indices.
    cfg.DATASETS.FOLDER_CLASSES = []
    # Base folder of relative IMAGE_DIR and LABEL_DIR; "" = $DETECTRON2_DATASETS.
    cfg.DATASETS.FOLDER_ROOT = ""
    # Your own datasets in COCO's format, each a mapping with NAME, IMAGE_DIR and JSON_FILE, the
    # arguments of semask.data.register_coco_folder; relative paths start at FOLDER_ROOT. With
    # ALLOW_OUTSIDE True the file may name images outside IMAGE_DIR. MODEL.ROI_HEADS.NUM_CLASSES
    # (MODEL.RETINANET.NUM_CLASSES) 0 means the dataset's number of categories.
    cfg.DATASETS.COCO_FOLDERS = []
    # Your own datasets in COCO's panoptic format, each a mapping with NAME, IMAGE_DIR, PANOPTIC_DIR
    # and JSON_FILE, the arguments of semask.data.register_panoptic_folder.
    cfg.DATASETS.PANOPTIC_FOLDERS = []
    # Number of images of each dataset that are checked before a run.
    cfg.DATASETS.CHECK_SAMPLE = 16
    # Number of missing or damaged files that a run skips, and lists at its end, before it fails.
    cfg.DATALOADER.MAX_UNREADABLE = 10

    # ---- channels and values of the images ----
    # Detectron2's MODEL.PIXEL_MEAN and PIXEL_STD have one value per channel: three for RGB, one for
    # grey, N for TIFFs with bands and .npy arrays (docs/own_data.md). The file values that are
    # mapped to 0 and 255, such as [0, 4095] for 12 bits; [] = 0 and the largest value of the files'
    # dtype (photographs with 16 bits are read by their upper eight).
    cfg.INPUT.VALUE_RANGE = []
    # The three channels that pictures show as red, green and blue; [] = the first three, or the
    # first one in grey if there are fewer.
    cfg.INPUT.PICTURE_BANDS = []

    # ---- input (in addition to Detectron2's INPUT.FORMAT, INPUT.CROP and INPUT.RANDOM_FLIP) ----
    # With TASK "instance" and "panoptic", Detectron2's keys (MIN_SIZE_TRAIN, ...), LSJ and
    # PHOTOMETRIC_DISTORTION apply instead of the keys on scales and crops. TASK "semantic":
    # "sem_seg" = the pipeline of the SeMask-FPN models; "mask_former_semantic" = that of the
    # mask-classification models, which also returns a mask for each class. TASK "instance":
    # "mask_former_instance", the same pipeline; "coco_instance_lsj", large-scale jitter padded to
    # LSJ.SIZE, regardless of LSJ.ENABLED; either of the two above = Detectron2's. TASK "panoptic"
    # with mask classification: "mask_former_panoptic" or "coco_panoptic_lsj", which are the same
    # two pipelines.
    cfg.INPUT.DATASET_MAPPER_NAME = "sem_seg"
    # The image is resized, aspect ratio kept, by min(long / longer side, short / shorter side).
    cfg.INPUT.SCALE = [2048, 512]
    # In training that scale is multiplied by one of these factors ("choice") or by one drawn
    # uniformly between the two given ("range").
    cfg.INPUT.SCALE_FACTORS = [0.5, 0.75, 1.0, 1.25, 1.5, 1.75]
    cfg.INPUT.SCALE_SAMPLING = "choice"
    # Random brightness, contrast, saturation and hue, for 8-bit RGB images only.
    cfg.INPUT.PHOTOMETRIC_DISTORTION = True
    # INPUT.CROP.SIZE is (height, width) in pixels; smaller images are padded to it.
    cfg.INPUT.CROP.SINGLE_CATEGORY_MAX_AREA = 1.0
    # Mask classification (INPUT.DATASET_MAPPER_NAME "mask_former_semantic"): the shorter side is
    # one of Detectron2's MIN_SIZE_TRAIN, and the crop is padded (or cut) to a square of this side;
    # -1 = no padding.
    cfg.INPUT.SIZE_DIVISIBILITY = -1
    # Interpolation of resized label maps: "nearest-exact", aligned with the image's pixels, or
    # "nearest", half a pixel off, as in the training of the published models.
    cfg.INPUT.LABEL_INTERPOLATION = "nearest-exact"
    # Keep instances and segments that augmentation leaves without pixels, with an empty mask, as in
    # the training of the published Mask2Former for ADE20K, Cityscapes and COCO panoptic.
    # (DATALOADER.FILTER_EMPTY_ANNOTATIONS is about images without instances.)
    cfg.INPUT.KEEP_EMPTY_MASKS = False
    # Detectors: large-scale jitter in training, instead of MIN_SIZE_TRAIN and INPUT.CROP. The image
    # is resized to fit into SIZE (height, width) times a factor from SCALE, and cropped to SIZE.
    # DIAGONAL_CROPS: one random number places the crop in both directions, as in Detectron2.
    cfg.INPUT.LSJ = CfgNode()
    cfg.INPUT.LSJ.ENABLED = False
    cfg.INPUT.LSJ.SCALE = [0.1, 2.0]
    cfg.INPUT.LSJ.SIZE = [1024, 1024]
    cfg.INPUT.LSJ.DIAGONAL_CROPS = False

    # ---- solver ----
    cfg.SOLVER.OPTIMIZER = "ADAMW"
    cfg.SOLVER.BETAS = [0.9, 0.999]
    cfg.SOLVER.EPS = 1e-8
    # Parameters without weight decay: "layer_norm", "group_norm", "batch_norm", "embedding" (all
    # parameters of such modules) and "position" (bias tables, absolute position embeddings).
    cfg.SOLVER.NO_DECAY = ["layer_norm", "position"]
    # Learning rate of the backbone, semantic layers included, as a multiple of BASE_LR.
    cfg.SOLVER.BACKBONE_MULTIPLIER = 1.0
    # CLIP_GRADIENTS.CLIP_TYPE can also be "full_model": one factor for all gradients.
    # Exponent of SOLVER.LR_SCHEDULER_NAME "WarmupPolyLR".
    cfg.SOLVER.POLY_LR_POWER = 1.0
    # Number of batches whose gradients are averaged for one step: SOLVER.IMS_PER_BATCH is the batch
    # of a step over all processes, of which IMS_PER_BATCH / ACCUMULATE_STEPS are processed at a
    # time. BatchNorm computes its statistics over each part.
    cfg.SOLVER.ACCUMULATE_STEPS = 1
    # With SOLVER.AMP.ENABLED: "bfloat16" (CUDA and CPU) or "float16" (CUDA, with loss scaling).
    cfg.SOLVER.AMP.PRECISION = "bfloat16"
    # Use torch.compile in training; if it fails, a warning is logged.
    cfg.SOLVER.COMPILE = False
    # Keep an exponential moving average of the weights, and evaluate it in addition to them.
    cfg.SOLVER.EMA = CfgNode()
    cfg.SOLVER.EMA.ENABLED = False
    # Weight of the previous average in the new one, at each step.
    cfg.SOLVER.EMA.DECAY = 0.999

    # ---- evaluation ----
    # How an image is predicted, by SeMaskSegmentor: "whole" at INPUT.SCALE; "multi_scale", the
    # mean of the class probabilities over several scales; or "slide", in overlapping windows of
    # the image at INPUT.SCALE, for images too large for the device.
    cfg.TEST.PROTOCOL = "whole"
    # Factors on INPUT.SCALE, and whether each size is also predicted mirrored.
    cfg.TEST.MULTI_SCALE_FACTORS = [0.5, 0.75, 1.0, 1.25, 1.5, 1.75]
    cfg.TEST.MULTI_SCALE_FLIP = True
    # Mask classification: the sizes are Detectron2's TEST.AUG.MIN_SIZES and MAX_SIZE, made from
    # the image at the test size, as published (resized twice), or from the original image.
    cfg.TEST.AUG.FROM_RESIZED = False
    # (height, width) of a window, and the stride between windows, in pixels.
    cfg.TEST.SLIDE_CROP = [512, 512]
    cfg.TEST.SLIDE_STRIDE = [341, 341]
    # Evaluate and predict in mixed precision: "bfloat16" (CUDA and CPU) or "float16" (CUDA). The
    # scores differ a little from those of float32.
    cfg.TEST.AMP = CfgNode()
    cfg.TEST.AMP.ENABLED = False
    cfg.TEST.AMP.PRECISION = "bfloat16"
    # The weights with the highest value of this metric (on the first dataset of DATASETS.TEST) are
    # kept as model_best.pth; "" = none.
    cfg.TEST.BEST_METRIC = "sem_seg/mIoU"
    # Number of images drawn with their labels and predictions after each evaluation; 0 = none.
    cfg.TEST.NUM_PANELS = 8
    # Write a report, OUTPUT_DIR/inference/DATASET/report.html, after each evaluation. It costs
    # about as much as a second argmax of every image and eight more predictions.
    cfg.TEST.REPORT = True
    # Also measure Boundary IoU (arXiv 2103.16562): IoU within 2 % of the diagonal from contours; of
    # instances with masks Boundary AP.
    cfg.TEST.BOUNDARY_IOU = False
    # The library that computes AP: "pycocotools", or "hotcoco" for the same numbers in less time.
    cfg.TEST.AP_LIBRARY = "pycocotools"
    # Write each prediction, as a label map, to OUTPUT_DIR/inference/DATASET/predictions.
    cfg.TEST.SAVE_PREDICTIONS = False
