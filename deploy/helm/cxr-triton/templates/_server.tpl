{{- define "server.container" -}}
{{- $recipe := include "recipe" . | fromYaml -}}
{{- $server := .Values.server -}}
image: {{ include "image" (dict "image" $server.image "tag" $recipe.tag) }}
imagePullPolicy: {{ $server.image.pullPolicy }}
workingDir: /repository
ports:
  - {name: grpc, containerPort: 8001, protocol: TCP}
  - {name: metrics, containerPort: 8002, protocol: TCP}
{{- if or $server.secretName .Values.tracing.collector }}
env:
  {{- with $server.secretName }}
  - name: CXR_TRITON_SECRET
    valueFrom: {secretKeyRef: {name: {{ . }}, key: CXR_TRITON_SECRET}}
  {{- end }}
  {{- include "collector.env" . | nindent 2 }}
{{- end }}
securityContext: {{ include "containerSecurity" . | nindent 2 }}
resources:
  {{- range $kind, $amounts := $server.resources }}
  {{ $kind }}:
    {{- toYaml $amounts | nindent 4 }}
    {{- if $server.gpu.count }}
    {{ $server.gpu.resource }}: {{ $server.gpu.count }}
    {{- end }}
  {{- end }}
startupProbe:
  exec:
    {{- if $server.probes.reading }}
    command: [python3, /etc/cxr-triton/first_reading.py, "127.0.0.1:8001", {{ $server.probes.readingSeconds | quote }}]
    {{- else }}
    command: [python3, -m, cxr_triton.triton_repo.guard, --is-ready, "127.0.0.1:8001"]
    {{- end }}
  periodSeconds: 10
  timeoutSeconds: {{ add $server.probes.readingSeconds 30 }}
  failureThreshold: {{ mul $server.probes.startMinutes 6 }}
readinessProbe:
  exec:
    command: [python3, -m, cxr_triton.triton_repo.guard, --is-ready, "127.0.0.1:8001"]
  periodSeconds: 10
  timeoutSeconds: 10
  failureThreshold: 2
livenessProbe:
  exec:
    command: [python3, -m, cxr_triton.triton_repo.guard, --is-ready, "127.0.0.1:8001"]
  periodSeconds: 20
  timeoutSeconds: 15
  failureThreshold: 9
lifecycle:
  preStop:
    exec:
      command:
        - python3
        - /etc/cxr-triton/drain.py
        - http://127.0.0.1:8002/metrics
        - {{ $server.drain.settleSeconds | quote }}
        - {{ $server.drain.seconds | quote }}
volumeMounts:
  - {name: repository, mountPath: /repository, readOnly: true{{ with .Values.repository.subPath }}, subPath: {{ . | quote }}{{ end }}}
  - {name: scripts, mountPath: /etc/cxr-triton, readOnly: true}
  - {name: shm, mountPath: /dev/shm}
  - {name: tmp, mountPath: /tmp}
{{- end }}

{{- define "server.pod" -}}
{{- $recipe := include "recipe" . | fromYaml -}}
{{- $server := .Values.server -}}
{{- $labelled := and $server.gpu.count (or (and $server.gpu.byLabels $recipe.capability) $server.gpu.product) -}}
serviceAccountName: {{ include "name" . }}-server
automountServiceAccountToken: false
enableServiceLinks: false
terminationGracePeriodSeconds: {{ include "serverGrace" . }}
securityContext: {{ include "podSecurity" . | nindent 2 }}
{{- include "pullSecrets" . }}
{{- with $server.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with $server.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with $server.nodeSelector }}
nodeSelector: {{ toYaml . | nindent 2 }}
{{- end }}
{{- with $server.tolerations }}
tolerations: {{ toYaml . | nindent 2 }}
{{- end }}
{{- if or $labelled (ne $server.antiAffinity "none") }}
affinity:
  {{- if ne $server.antiAffinity "none" }}
  {{- include "antiAffinity" (dict "root" . "component" "server" "how" $server.antiAffinity) | nindent 2 }}
  {{- end }}
  {{- if $labelled }}
  nodeAffinity:
    requiredDuringSchedulingIgnoredDuringExecution:
      nodeSelectorTerms:
        - matchExpressions:
            {{- if and $server.gpu.byLabels $recipe.capability }}
            {{- $parts := splitList "." $recipe.capability }}
            - {key: nvidia.com/gpu.compute.major, operator: In, values: [{{ index $parts 0 | quote }}]}
            - {key: nvidia.com/gpu.compute.minor, operator: In, values: [{{ index $parts 1 | quote }}]}
            - {key: nvidia.com/gpu.memory, operator: Gt, values: [{{ sub (mul $recipe.memoryGib 1024) 1 | quote }}]}
            {{- end }}
            {{- with $server.gpu.product }}
            - {key: nvidia.com/gpu.product, operator: In, values: [{{ . | quote }}]}
            {{- end }}
  {{- end }}
{{- end }}
{{- with .Values.repository.init.image }}
initContainers:
  - name: repository
    image: {{ . }}
    command: [cp, -R, {{ printf "%s/." $.Values.repository.init.path | quote }}, /target/]
    securityContext: {{ include "containerSecurity" $ | nindent 6 }}
    resources:
      requests: {cpu: 100m, memory: 256Mi}
      limits: {cpu: "2", memory: 1Gi}
    volumeMounts:
      - {name: repository, mountPath: /target}
{{- end }}
volumes:
  - name: repository
    {{- if .Values.repository.init.image }}
    emptyDir: {sizeLimit: {{ .Values.repository.init.size }}}
    {{- else if .Values.repository.image }}
    image: {reference: {{ .Values.repository.image | quote }}, pullPolicy: IfNotPresent}
    {{- else }}
    persistentVolumeClaim: {claimName: {{ .Values.repository.claim }}, readOnly: true}
    {{- end }}
  - name: scripts
    configMap: {name: {{ include "name" . }}-server}
  - name: shm
    emptyDir: {medium: Memory, sizeLimit: {{ $server.sharedMemory }}}
  - name: tmp
    emptyDir: {sizeLimit: {{ $server.tmp }}}
{{- end }}
